//! A client's socket, and whether the client is still there.
//!
//! A client that has sent its request may close its half of the connection and wait for the reply, as `nc -N` does. On the
//! wire that looks like one that has closed the whole of it: a FIN. What tells them apart is how their system takes data
//! that is sent to them: the latter's answers with a reset. So the first byte of the reply is sent ahead; every reply
//! begins with the same one. Where that is not possible, because the connection has had other replies or is encrypted, the
//! client is taken to be gone: connections that are used again belong to HTTP libraries, which never close one half.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

/// The first byte of every reply: of `HTTP/1.0` or `HTTP/1.1`.
const FIRST: &[u8] = b"H";
/// Interval at which a connection that is half closed is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// What the sides of a connection know of it.
#[derive(Debug)]
struct Shared {
    stream: TcpStream,
    is_encrypted: bool,
    /// A handler has a request and has not replied.
    is_waiting: AtomicBool,
    /// Bytes were handed to the system by the server itself.
    has_replied: AtomicBool,
    /// The first byte of the reply was sent ahead of the rest.
    is_begun: AtomicBool,
}

/// A socket as a stream of bytes.
#[derive(Debug)]
pub(super) struct Socket(Arc<Shared>);

/// Watches over the client of a [`Socket`].
#[derive(Debug, Clone)]
pub(super) struct Client(Arc<Shared>);

/// While it lives, a handler has a request and has not replied.
pub(super) struct Waiting(Client);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.0.is_waiting.store(false, Ordering::Relaxed);
    }
}

impl Socket {
    pub fn new(stream: TcpStream, is_encrypted: bool) -> Socket {
        // Small pieces of a stream are not held back.
        let _ = stream.set_nodelay(true);
        let [is_waiting, has_replied, is_begun] = [false; 3].map(AtomicBool::new);
        Socket(Arc::new(Shared { stream, is_encrypted, is_waiting, has_replied, is_begun }))
    }

    pub fn client(&self) -> Client {
        Client(self.0.clone())
    }
}

impl Client {
    /// Notes that a handler has a request.
    pub fn waits(&self) -> Waiting {
        self.0.is_waiting.store(true, Ordering::Relaxed);
        Waiting(self.clone())
    }

    /// Returns once the client is gone and would not read a reply. To be called by the task that serves the connection.
    pub async fn gone(&self) {
        loop {
            match self.has_closed().await {
                Ok(true) if self.is_reset() || self.would_not_read() => return,
                // Replies that are under way fail by themselves where nobody takes them.
                Ok(_) => tokio::time::sleep(LOOK).await,
                Err(_) => return,
            }
        }
    }

    /// Waits until something comes, and returns true if it is, or is followed by, the end of what the client sends.
    async fn has_closed(&self) -> io::Result<bool> {
        let stream = &self.0.stream;
        match stream.peek(&mut [0]).await? {
            0 => Ok(true),
            _ => Ok(stream.ready(Interest::READABLE).await?.is_read_closed()),
        }
    }

    /// The client's system has taken the connection down.
    fn is_reset(&self) -> bool {
        !matches!(self.0.stream.take_error(), Ok(None)) || self.0.stream.peer_addr().is_err()
    }

    /// Where a reply is still to come, sends its first byte to a client that has closed its half; true where that cannot be
    /// done.
    fn would_not_read(&self) -> bool {
        let Shared { stream, is_encrypted, is_waiting, has_replied, is_begun } = &*self.0;
        if !is_waiting.load(Ordering::Relaxed) || is_begun.load(Ordering::Relaxed) {
            return false;
        }
        if *is_encrypted || has_replied.load(Ordering::Relaxed) {
            return true;
        }
        match stream.try_write(FIRST) {
            Ok(bytes) => is_begun.store(bytes == FIRST.len(), Ordering::Relaxed),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return true,
        }
        false
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let stream = &self.0.stream;
        loop {
            ready!(stream.poll_read_ready(cx))?;
            match stream.try_read(buffer.initialize_unfilled()) {
                Ok(bytes) => {
                    buffer.advance(bytes);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl Socket {
    /// Writes buffers, less the byte that was sent ahead.
    fn write(&self, cx: &mut Context<'_>, buffers: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let Shared { stream, has_replied, is_begun, .. } = &*self.0;
        let is_first = !has_replied.load(Ordering::Relaxed) && buffers.iter().any(|buffer| !buffer.is_empty());
        if is_first {
            has_replied.store(true, Ordering::Relaxed);
            if is_begun.load(Ordering::Relaxed) {
                return Poll::Ready(Ok(FIRST.len()));
            }
        }
        loop {
            ready!(stream.poll_write_ready(cx))?;
            match stream.try_write_vectored(buffers) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.write(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.write(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // It is closed when it is dropped, which follows.
        Poll::Ready(Ok(()))
    }
}
