"""The sparse autoencoder: its config, its arithmetic, reading and writing."""
