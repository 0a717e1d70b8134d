"""Small stand-ins that the generation tests share."""
