"""Surface changes: the same thing asked in another way, another spelling, another form, another frame.

Everything here works on text and returns changed prompts (or questions with alternatives); the caller tokenises prompt
and completion as one text, so nothing is ever re-tokenised in halves. All choices follow from a seed.
"""
