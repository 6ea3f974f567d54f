"""SAEs of other tools: read exactly, with a certificate of parity, or refused with the reason."""
