"""Password functions that ``<ssl>`` sections of test_tls.py name; imported by ZEO's server processes too."""


def secret():
    return "secret"


def of_zeos_test_key():
    return "1234"
