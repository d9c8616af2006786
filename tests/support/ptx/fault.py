"""What a kernel does wrong."""


class Fault(Exception):
    """A kernel did what the PTX manual forbids, or what this interpreter doesn't know."""
