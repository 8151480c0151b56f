"""The steps that every structural merge goes through, from the configuration to the card."""
