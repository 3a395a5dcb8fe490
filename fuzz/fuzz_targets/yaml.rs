#![no_main]

aotron_fuzz::target!(yaml);
