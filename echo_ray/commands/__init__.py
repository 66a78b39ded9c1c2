"""One module per subcommand of `echo-ray`, imported only when it is called.

What it may import: anything.
"""
