"""Images and labels: archives and folders of users, what their layout says, decoding, batches."""
