"""Exit codes, and the last words of an interrupted command. Imports nothing: see ``__main__``."""

EXIT_DONE = 0
EXIT_UNEXPECTED = 1
EXIT_USAGE = 2  # wrong usage, configuration, model or input, found before any work started
EXIT_INCOMPLETE = 3  # done, but too much failed; or a result that is not whole
EXIT_INTERRUPTED = 130

INTERRUPTED = "interrupted; run the same command again to resume"
