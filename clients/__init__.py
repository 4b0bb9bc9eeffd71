"""All that runs beside a merchant's customers."""
