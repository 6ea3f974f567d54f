"""From a finished run to the folders that are uploaded."""
