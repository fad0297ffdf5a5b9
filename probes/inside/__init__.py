"""What the hidden states of a language model still hold of a record, block by block."""
