from tests.digits_data import digits_root  # noqa: F401  a fixture
