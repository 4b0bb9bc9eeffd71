"""What both ends of the wire must agree on; imports none of the other rooms."""
