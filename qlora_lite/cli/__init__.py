"""The command line: one file a command, named as the command; options has what several share, main runs them."""
