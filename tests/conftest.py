"""What all tests share: speed is measured in bench/ and never decides a test."""

from hypothesis import settings

settings.register_profile("ramster", deadline=None, print_blob=True)
settings.load_profile("ramster")
