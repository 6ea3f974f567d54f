"""Inside reward models: what separates chosen from rejected answers, and what editing preference data does (SAFER)."""
