"""Requests that come and go, and the passes that all of them share."""
