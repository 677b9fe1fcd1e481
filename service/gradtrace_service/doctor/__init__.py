"""`gradtrace doctor`: what is wrong, or will be, with an index or with a service. It changes nothing."""
