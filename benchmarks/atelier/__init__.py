"""How the bundled base is made: its scenes, captions, training and quality."""
