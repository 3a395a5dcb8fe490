#![no_main]

// What one answer's grammar may take, and the form of a second while it compiles.
aotron_fuzz::target!(grammar, open: aotron::fuzzing::open_server, bytes: 96 << 20);
