#![no_main]

aotron_fuzz::target!(chat, open: aotron::fuzzing::open_server);
