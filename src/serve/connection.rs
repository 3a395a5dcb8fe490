//! Sockets: limits on their number and on the time that a client may take, and draining.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::ConnectInfo;
use axum::http::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_io_timeout::TimeoutStream;
use tower::ServiceExt;

use super::app::{App, router};
use super::socket::{Client, Socket};
use super::tls::Tls;

/// Headers of a request.
const MAX_HEADERS: usize = 100;
/// Bytes of a request's headers, and of what is read ahead of it.
const MAX_HEADER_BYTES: usize = 64 << 10;
/// Interval at which a server that stops looks whether all is done.
const POLL: Duration = Duration::from_millis(5);
/// Time for the clients of requests that were cut off to be told, and for connections without a request to be closed.
const FAREWELL: Duration = Duration::from_millis(500);
/// Pause after the operating system has refused a connection, as where there are no more descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until `stop` is done, then drains; returns true if every request was finished.
pub(super) async fn serve(
    listeners: Vec<TcpListener>,
    tls: Option<Tls>,
    app: Arc<App>,
    stop: impl Future<Output = ()>,
) -> bool {
    let router = router(app.clone());
    let room = Arc::new(Semaphore::new(app.options().max_connections));
    let graceful = Arc::new(GracefulShutdown::new());
    let accept = listeners.into_iter().map(|listener| {
        let (app, router, room, watcher) = (app.clone(), router.clone(), room.clone(), graceful.clone());
        let tls = tls.clone();
        tokio::spawn(async move {
            loop {
                // Beyond the limit, connections wait in the operating system's queue.
                let Ok(permit) = room.clone().acquire_owned().await else { return };
                let (stream, address) = match listener.accept().await {
                    Ok(accepted) => accepted,
                    Err(_) => {
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                        continue;
                    }
                };
                let (timeout, router, watcher) = (app.options().client_timeout, router.clone(), watcher.watcher());
                let tls = tls.clone();
                tokio::spawn(async move {
                    let _permit = permit;
                    let socket = Socket::new(stream, tls.is_some());
                    let client = socket.client();
                    let stream = with_timeout(socket, timeout);
                    let Some(tls) = tls else {
                        return converse(stream, client, address, timeout, router, watcher).await;
                    };
                    // A client that is too slow, or speaks something else, is its own business.
                    if let Ok(Ok(stream)) = tokio::time::timeout(timeout, tls.accept(stream)).await {
                        converse(stream, client, address, timeout, router, watcher).await;
                    }
                });
            }
        })
    });
    let accept: Vec<_> = accept.collect();
    stop.await;
    app.drain();
    // While running requests are finished, new connections are still answered: with 503.
    let is_done = tokio::time::timeout(app.options().drain_timeout, until_answered(&app)).await.is_ok();
    if !is_done {
        // What still runs fails, and its clients are told, so that none takes a part for the whole.
        app.shut_down();
        let _ = tokio::time::timeout(FAREWELL, until_answered(&app)).await;
    }
    for task in accept {
        task.abort();
        // What it holds is gone once it has ended.
        let _ = task.await;
    }
    if let Some(graceful) = Arc::into_inner(graceful) {
        // Connections without a request are closed in order, but not waited for.
        let _ = tokio::time::timeout(FAREWELL, graceful.shutdown()).await;
    }
    is_done
}

/// Waits until every response is over.
async fn until_answered(app: &App) {
    while app.in_flight() > 0 {
        tokio::time::sleep(POLL).await;
    }
}

/// A socket whose writes have a time limit.
fn with_timeout(socket: Socket, timeout: Duration) -> Pin<Box<TimeoutStream<Socket>>> {
    let mut stream = TimeoutStream::new(socket);
    stream.set_write_timeout(Some(timeout));
    Box::pin(stream)
}

/// Serves one connection.
async fn converse(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    client: Client,
    address: SocketAddr,
    timeout: Duration,
    router: axum::Router,
    watcher: hyper_util::server::graceful::Watcher,
) {
    let waiter = client.clone();
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(ConnectInfo(address));
        let waiting = waiter.waits();
        let reply = router.clone().oneshot(request.map(Body::new));
        async move {
            let reply = reply.await;
            drop(waiting);
            reply
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timeout)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEADER_BYTES)
        // `client` tells those that have left from those that have only nothing more to send.
        .half_close(true)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        // A client that breaks the protocol or leaves is its own business.
        _ = watcher.watch(connection) => {}
        () = client.gone() => {}
    }
}
