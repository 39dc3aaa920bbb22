"""What a sparse autoencoder is: weights and semantics, the encoder, loaders."""
