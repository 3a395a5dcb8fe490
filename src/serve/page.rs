//! The page to talk to the model and that of the documentation, whose files are in the program.

use std::sync::Arc;

use axum::Router;
use axum::extract::Path;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::app::App;
use super::error::ApiError;

/// Nothing but the server's own files runs, and nothing is read from elsewhere.
const POLICY: &str = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src \
                      'none'; require-trusted-types-for 'script'";
const CSS: &str = "text/css; charset=utf-8";
const HTML: &str = "text/html; charset=utf-8";
const JAVASCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// Lists files of the folder `page` with their types and contents.
macro_rules! files {
    ($($kind:ident: $($name:literal)*;)*) => {
        &[$($(($name, $kind, include_str!(concat!("page/", $name))),)*)*]
    };
}

/// Names, types and contents.
const FILES: &[(&str, &str, &str)] = files! {
    HTML: "docs.html" "index.html";
    CSS: "answer.css" "docs.css" "page.css";
    SVG: "favicon.svg";
    JAVASCRIPT: "api.js" "blocks.js" "composer.js" "connection.js" "conversation.js" "dialogs.js" "docs.js"
        "dom.js" "generation.js" "highlight.js" "inline.js" "markdown.js" "message.js" "page.js" "preferences.js" "settings.js"
        "sidebar.js" "sse.js" "storage.js" "theme.js" "thread.js" "tokens.js" "transfer.js";
};

/// The routes of the pages, which need no key: the page asks for it.
pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/", get(|| async { file("index.html") }))
        .route("/docs", get(|| async { file("docs.html") }))
        .route("/page/{name}", get(named))
}

async fn named(Path(name): Path<String>) -> Response {
    file(&name)
}

fn file(name: &str) -> Response {
    let Some((_, kind, content)) = FILES.iter().find(|(known, ..)| *known == name) else {
        return ApiError::not_found().into_response();
    };
    let headers = [
        (header::CONTENT_TYPE, *kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, *content).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that is added to the folder is served too.
    #[test]
    fn every_file_of_the_folder_is_served() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/serve/page");
        let mut found: Vec<String> =
            std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        found.sort();
        let mut served: Vec<&str> = FILES.iter().map(|(name, ..)| *name).collect();
        served.sort_unstable();
        assert_eq!(found, served);
    }
}
