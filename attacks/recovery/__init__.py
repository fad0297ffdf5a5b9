"""Recovery: does what an edit removed come back when the edited model is changed, nudged or taught a little?"""
