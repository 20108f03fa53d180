"""Transcendent memory: what put, get and flush promise, and a readable reference that keeps the promise."""
