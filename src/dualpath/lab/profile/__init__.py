"""`dualpath profile`: measures this machine with the runtime's own code and makes a `lab.facts.profile`."""
