"""NNI's quantizers behind an interface of ours."""
