"""What every structural merge goes through, from the configuration to the card."""
