"""The recorder as a callback of training frameworks. Each module needs its framework: `gradtrace[frameworks]`."""
