"""`dualpath profile`: measures this machine with the runtime's own code. What comes out is a `lab.facts.profile`."""
