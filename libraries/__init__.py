"""What layerpack uses of other libraries beside their documented surface: one file a library.

Each has a contract test (tests/libraries/) that fails by name where a version moves something.
"""
