"""What brings actor, request and transaction along in other people's frameworks: a module each, with its extra.

Nothing here is imported by the rest of the package, and a module imports its framework, nobody else's.
"""
