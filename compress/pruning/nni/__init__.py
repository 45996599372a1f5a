"""NNI's pruners behind an interface of ours."""
