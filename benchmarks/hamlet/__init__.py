"""Hamlet, a base that nothing was tuned on: natural captions, an ordinary vocabulary, other scenes."""
