#![no_main]

aotron_fuzz::target!(tensors, open: aotron::fuzzing::open_server, repair: aotron_fuzz::repair::tensors);
