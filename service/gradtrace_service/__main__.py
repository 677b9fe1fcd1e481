"""`python -m gradtrace_service` is the command line."""

from gradtrace_service.cli import main

main()
