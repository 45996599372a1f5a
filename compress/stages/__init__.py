"""The stages of a run, one after the other, and what they share. `compress.pipeline` calls them in order."""
