"""Using the neurons: which fire on which token, what they mean and how far to trust it."""
