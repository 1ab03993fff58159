"""A tool that the demo model does not know: `mistral-large chat MODEL --tools examples/fine_tune/forecast.py`."""


def get_forecast(location: str, days: int) -> int:
    """
    Get the weather forecast

    Args:
        location: The city
        days: How many days ahead
    """
    return 10 + (len(location) * days) % 20
