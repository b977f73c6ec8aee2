"""Models: loading, adapters, roles, tokens, sampling, likelihoods."""
