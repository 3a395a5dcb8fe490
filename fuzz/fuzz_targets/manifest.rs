#![no_main]

aotron_fuzz::target!(manifest);
