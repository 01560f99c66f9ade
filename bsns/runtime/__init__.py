"""Execution of shard units with torch: model preparation, weights, stage executor, activation codec, profile.

The only package of the library that may import torch and transformers. Importing `bsns.runtime` alone imports neither.
"""
