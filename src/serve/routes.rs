//! Routes together with their paths, which the OpenAPI document is compared with.

use std::sync::Arc;

use axum::Router;
use axum::handler::Handler;
use axum::http::Method;
use axum::routing::{get, post};

use super::app::App;

/// Routes, and the methods and paths of all of them.
#[derive(Default)]
pub(super) struct Routes {
    router: Router<Arc<App>>,
    paths: Vec<(Method, String)>,
}

impl Routes {
    pub fn get<H: Handler<T, Arc<App>>, T: 'static>(mut self, path: &str, handler: H) -> Routes {
        self.paths.push((Method::GET, path.to_owned()));
        Routes { router: self.router.route(path, get(handler)), ..self }
    }

    pub fn post<H: Handler<T, Arc<App>>, T: 'static>(mut self, path: &str, handler: H) -> Routes {
        self.paths.push((Method::POST, path.to_owned()));
        Routes { router: self.router.route(path, post(handler)), ..self }
    }

    #[cfg(test)]
    pub fn paths(&self) -> &[(Method, String)] {
        &self.paths
    }

    pub fn into_router(self) -> Router<Arc<App>> {
        self.router
    }
}
