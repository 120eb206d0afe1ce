"""The way of the bytes: from disk and host memory into the device's slots."""
