//! The stand-in for `tls.rs` in a build without the feature `tls`.

use std::io;

use super::options::TlsFiles;
use crate::error::{Error, Result};

/// There is none.
#[derive(Clone)]
pub(super) enum Tls {}

impl Tls {
    /// # Errors
    /// Always [`Error::Serve`].
    pub fn load(_: &TlsFiles) -> Result<Tls> {
        Err(Error::Serve("this program was built without TLS; build it with the feature tls".into()))
    }

    pub async fn accept<S>(&self, _: S) -> io::Result<S> {
        match *self {}
    }
}
