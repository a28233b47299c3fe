//! From a request-target to a [`Route`]: one decode, one `match`.
//!
//! Keys may hold any byte, so the path is decoded once as a whole and matched as bytes; a router that matches or folds the raw path
//! (`//`, `.`, `%2F`) could not tell keys apart.

use bytes::Bytes;

use super::error::{ApiError, Problem};
use super::percent;

/// Longest key in bytes.
pub(super) const MAX_KEY_BYTES: usize = 4096;

/// What can be asked for. The order is the order of the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
pub(super) enum Route {
    /// `/{key}`
    ShortKey,
    /// `/v1/kv/{key}`
    Key,
    /// `/v1/kv`
    Range,
    /// `/v1/txn`
    Txn,
    /// `/v1/watch`
    Watch,
    /// `/v1/leases`
    Leases,
    /// `/v1/leases/{id}`
    Lease,
    /// `/v1/leases/{id}/keepalive`
    KeepAlive,
    /// `/v1/compact`
    Compact,
    /// `/v1/hash`
    Hash,
    /// `/v1/snapshot`
    Snapshot,
    /// `/members`
    Members,
    /// `/members/replace`
    Replace,
    /// `/members/{id}`
    Member,
    /// `/members/{id}/promote`
    Promote,
    /// `/leader`
    Leader,
    /// `/`
    Root,
    /// `/health`
    Health,
    /// `/livez`
    Livez,
    /// `/readyz`
    Readyz,
    /// `/status`
    Status,
    /// `/version`
    Version,
    /// `/metrics`
    Metrics,
    /// `/openapi.json`
    OpenApi,
    /// `/debug/log`
    DebugLog,
    /// Below a reserved first segment, and nothing of the above.
    Unknown,
}

impl Route {
    /// All routes, each at the index that is its number.
    pub(super) const ALL: [Route; 26] = [
        Route::ShortKey,
        Route::Key,
        Route::Range,
        Route::Txn,
        Route::Watch,
        Route::Leases,
        Route::Lease,
        Route::KeepAlive,
        Route::Compact,
        Route::Hash,
        Route::Snapshot,
        Route::Members,
        Route::Replace,
        Route::Member,
        Route::Promote,
        Route::Leader,
        Route::Root,
        Route::Health,
        Route::Livez,
        Route::Readyz,
        Route::Status,
        Route::Version,
        Route::Metrics,
        Route::OpenApi,
        Route::DebugLog,
        Route::Unknown,
    ];

    /// The path as documents and metrics name it.
    pub(super) fn template(self) -> &'static str {
        match self {
            Route::ShortKey => "/{key}",
            Route::Key => "/v1/kv/{key}",
            Route::Range => "/v1/kv",
            Route::Txn => "/v1/txn",
            Route::Watch => "/v1/watch",
            Route::Leases => "/v1/leases",
            Route::Lease => "/v1/leases/{id}",
            Route::KeepAlive => "/v1/leases/{id}/keepalive",
            Route::Compact => "/v1/compact",
            Route::Hash => "/v1/hash",
            Route::Snapshot => "/v1/snapshot",
            Route::Members => "/members",
            Route::Replace => "/members/replace",
            Route::Member => "/members/{id}",
            Route::Promote => "/members/{id}/promote",
            Route::Leader => "/leader",
            Route::Root => "/",
            Route::Health => "/health",
            Route::Livez => "/livez",
            Route::Readyz => "/readyz",
            Route::Status => "/status",
            Route::Version => "/version",
            Route::Metrics => "/metrics",
            Route::OpenApi => "/openapi.json",
            Route::DebugLog => "/debug/log",
            Route::Unknown => "unknown",
        }
    }

    /// The methods it serves, as `Allow` lists them (`HEAD` wherever `GET` is, `OPTIONS` everywhere).
    pub(super) fn allow(self) -> &'static str {
        match self {
            Route::ShortKey | Route::Key => "GET, HEAD, PUT, DELETE, OPTIONS",
            Route::Range | Route::Lease => "GET, HEAD, DELETE, OPTIONS",
            Route::Leases | Route::Members | Route::Leader => "GET, HEAD, POST, OPTIONS",
            Route::Txn | Route::KeepAlive | Route::Compact | Route::Replace | Route::Promote => "POST, OPTIONS",
            Route::Member => "PATCH, DELETE, OPTIONS",
            Route::DebugLog => "GET, HEAD, PUT, OPTIONS",
            Route::Unknown => "OPTIONS",
            Route::Watch
            | Route::Hash
            | Route::Snapshot
            | Route::Root
            | Route::Health
            | Route::Livez
            | Route::Readyz
            | Route::Status
            | Route::Version
            | Route::Metrics
            | Route::OpenApi => "GET, HEAD, OPTIONS",
        }
    }

    /// Whether it serves a method.
    pub(super) fn allows(self, method: &http::Method) -> bool {
        self.allow().split(", ").any(|allowed| allowed == method.as_str())
    }

    /// Whether its answers are about the store, and so carry `Metcd-Revision`.
    pub(super) fn is_data(self) -> bool {
        (self as usize) <= (Route::Snapshot as usize)
    }
}

/// A route and what stands in for `{key}` or `{id}` in it.
#[derive(Debug, PartialEq)]
pub(super) struct Target {
    /// Which.
    pub(super) route: Route,
    /// The key or the id; empty for the others. With [`Route::Unknown`] the whole path without its first `/`.
    pub(super) argument: Bytes,
}

/// Finds the target of a raw path.
pub(super) fn resolve(raw_path: &str) -> Result<Target, ApiError> {
    // `*` asks about the server as a whole, and is no path; an authority alone (CONNECT) has none.
    let Some(raw) = raw_path.strip_prefix('/').or(raw_path.is_empty().then_some("")) else {
        return Err(Problem::InvalidRequest("the request target must begin with `/`".to_owned()).into());
    };
    let Some(path) = percent::decode(raw.as_bytes()) else {
        return Err(Problem::InvalidKey("the path holds a broken percent escape: write `%25` for a percent sign".to_owned()).into());
    };
    let path = Bytes::from(path);
    let first = path.split(|&byte| byte == b'/').next().unwrap_or_default();
    let whole = |route| Target {
        route,
        argument: Bytes::new(),
    };
    Ok(match first {
        b"" if path.is_empty() => whole(Route::Root),
        b"v1" => resolve_v1(path),
        b"members" => resolve_members(path),
        b"leader" if first.len() == path.len() => whole(Route::Leader),
        b"health" if first.len() == path.len() => whole(Route::Health),
        b"livez" if first.len() == path.len() => whole(Route::Livez),
        b"readyz" if first.len() == path.len() => whole(Route::Readyz),
        b"status" if first.len() == path.len() => whole(Route::Status),
        b"version" if first.len() == path.len() => whole(Route::Version),
        b"metrics" if first.len() == path.len() => whole(Route::Metrics),
        b"openapi.json" if first.len() == path.len() => whole(Route::OpenApi),
        b"debug" if &path[..] == b"debug/log" => whole(Route::DebugLog),
        b"v2" | b"v3" | b"leader" | b"health" | b"livez" | b"readyz" | b"metrics" | b"status" | b"version" | b"ui" | b"openapi.json"
        | b"debug" | b"favicon.ico" => Target {
            route: Route::Unknown,
            argument: path,
        },
        _ => Target {
            route: Route::ShortKey,
            argument: path,
        },
    })
}

fn resolve_v1(path: Bytes) -> Target {
    const KEY: &[u8] = b"v1/kv/";
    const LEASE: &[u8] = b"v1/leases/";
    let route = match &path[..] {
        b"v1/kv" => Route::Range,
        b"v1/txn" => Route::Txn,
        b"v1/watch" => Route::Watch,
        b"v1/leases" => Route::Leases,
        b"v1/compact" => Route::Compact,
        b"v1/hash" => Route::Hash,
        b"v1/snapshot" => Route::Snapshot,
        key if key.starts_with(KEY) => {
            return Target {
                route: Route::Key,
                argument: path.slice(KEY.len()..),
            };
        }
        lease if lease.starts_with(LEASE) => {
            let rest = path.slice(LEASE.len()..);
            return by_id(&rest, b"/keepalive", Route::Lease, Route::KeepAlive).unwrap_or(Target {
                route: Route::Unknown,
                argument: path,
            });
        }
        _ => {
            return Target {
                route: Route::Unknown,
                argument: path,
            };
        }
    };
    Target {
        route,
        argument: Bytes::new(),
    }
}

fn resolve_members(path: Bytes) -> Target {
    let route = match &path[..] {
        b"members" => Route::Members,
        b"members/replace" => Route::Replace,
        _ => {
            let rest = path.strip_prefix(b"members/").map_or_else(Bytes::new, |rest| path.slice_ref(rest));
            return by_id(&rest, b"/promote", Route::Member, Route::Promote).unwrap_or(Target {
                route: Route::Unknown,
                argument: path,
            });
        }
    };
    Target {
        route,
        argument: Bytes::new(),
    }
}

/// `{id}` or `{id}<suffix>`.
fn by_id(rest: &Bytes, suffix: &[u8], plain: Route, suffixed: Route) -> Option<Target> {
    let (id, route) = match rest.strip_suffix(suffix) {
        Some(id) => (id, suffixed),
        None => (&rest[..], plain),
    };
    (!id.is_empty() && !id.contains(&b'/')).then(|| Target {
        route,
        argument: rest.slice_ref(id),
    })
}

/// Checks what came as a key, from a path, a query or a JSON body.
pub(super) fn check_key(key: &[u8]) -> Result<(), ApiError> {
    if key.is_empty() {
        return Err(Problem::InvalidKey("the key is empty; a list is at `/v1/kv?prefix=`, with no `/` before the `?`".to_owned()).into());
    }
    check_key_size(key)
}

/// Checks that it is no longer than a key may be.
pub(super) fn check_key_size(key: &[u8]) -> Result<(), ApiError> {
    if key.len() > MAX_KEY_BYTES {
        return Err(Problem::KeyTooLarge { bytes: key.len() }.into());
    }
    Ok(())
}

/// Why a route does not serve a method, with the `Allow` list and, where there is one, the URL that works.
pub(super) fn refuse_method(target: &Target, method: &http::Method, raw_path: &str) -> ApiError {
    let allow = target.route.allow();
    let writes = method == http::Method::PUT || method == http::Method::DELETE;
    let route = target.route;
    if route == Route::Root && writes {
        return Problem::InvalidKey("the key is empty: it is everything after the first `/`".to_owned()).into();
    }
    if matches!(route, Route::ShortKey | Route::Key) {
        let detail = format!("a key takes {allow}; a transaction is `POST /v1/txn`, a list is `GET /v1/kv?prefix=`");
        return Problem::MethodNotAllowed { allow, detail }.into();
    }
    if writes {
        let key = percent::decode(raw_path.strip_prefix('/').unwrap_or(raw_path).as_bytes()).unwrap_or_default();
        let detail = format!(
            "`{raw_path}` is reserved: the key of this name is at `/v1/kv/{}`",
            percent::encode(&key)
        );
        return Problem::ReservedKey { allow, detail }.into();
    }
    if route == Route::Unknown {
        return Problem::UnknownRoute.into();
    }
    Problem::MethodNotAllowed {
        allow,
        detail: format!("`{}` takes {allow}", route.template()),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use http::Method;

    use super::*;

    fn key(path: &str) -> Vec<u8> {
        let target = resolve(path).unwrap();
        assert!(matches!(target.route, Route::ShortKey | Route::Key), "{path}: {target:?}");
        target.argument.to_vec()
    }

    fn route(path: &str) -> Route {
        resolve(path).unwrap().route
    }

    #[test]
    fn a_key_is_everything_after_the_first_slash_decoded_once() {
        let cases: [(&str, &[u8]); 9] = [
            ("/hello", b"hello"),
            ("/a/b/c", b"a/b/c"),
            ("/a%2Fb", b"a/b"),
            ("/a+b", b"a+b"),
            ("//a//b/", b"/a//b/"),
            ("/a/../b/./c", b"a/../b/./c"),
            ("/..", b".."),
            ("/%00", b"\0"),
            ("/%2541", b"%41"),
        ];
        for (path, expected) in cases {
            assert_eq!(key(path), expected, "{path}");
            assert_eq!(key(&format!("/v1/kv{path}")), expected, "full form of {path}");
        }
        assert_eq!(key("/h%C3%A9"), "hé".as_bytes());
        assert_eq!(key("/hé"), "hé".as_bytes());
    }

    #[test]
    fn a_broken_escape_is_an_invalid_key() {
        for path in ["/%", "/a%4", "/v1/kv/%zz", "/members/%"] {
            assert_eq!(resolve(path).unwrap_err().problem.code(), "invalid_key", "{path}");
        }
    }

    #[test]
    fn reserved_first_segments_are_compared_after_decoding() {
        assert_eq!(route("/%76%31/kv"), Route::Range);
        assert_eq!(route("/v1%2Fkv%2Fx"), Route::Key);
        assert_eq!(route("/h%65alth"), Route::Health);
        for reserved in "v1 v2 v3 members leader health livez readyz metrics status version ui openapi.json debug favicon.ico".split(' ') {
            assert_eq!(route(&format!("/{reserved}/zzz/y")), Route::Unknown, "{reserved}");
            assert_ne!(route(&format!("/{reserved}")), Route::ShortKey, "{reserved}");
            assert_eq!(route(&format!("/{reserved}x")), Route::ShortKey, "{reserved}x");
            assert_eq!(route(&format!("/x/{reserved}")), Route::ShortKey, "x/{reserved}");
            assert_eq!(key(&format!("/v1/kv/{reserved}/a")), format!("{reserved}/a").into_bytes());
        }
    }

    #[test]
    fn ids_are_one_segment() {
        let target = resolve("/v1/leases/17/keepalive").unwrap();
        assert_eq!((target.route, &target.argument[..]), (Route::KeepAlive, &b"17"[..]));
        let target = resolve("/members/4").unwrap();
        assert_eq!((target.route, &target.argument[..]), (Route::Member, &b"4"[..]));
        assert_eq!(route("/members/4/promote"), Route::Promote);
        assert_eq!(route("/members/replace"), Route::Replace);
        for path in [
            "/members/",
            "/members/4/x",
            "/v1/leases/",
            "/v1/leases/1/2",
            "/members//promote",
            "/v1",
            "/v1/",
            "/ui",
            "/favicon.ico",
        ] {
            assert_eq!(route(path), Route::Unknown, "{path}");
        }
    }

    #[test]
    fn writing_a_reserved_short_form_names_the_url_that_works() {
        let cases = [
            ("/health", "/v1/kv/health"),
            ("/v1/x%20y", "/v1/kv/v1/x%20y"),
            ("/members", "/v1/kv/members"),
            ("/ui/a", "/v1/kv/ui/a"),
        ];
        for (path, works) in cases {
            let error = refuse_method(&resolve(path).unwrap(), &Method::PUT, path);
            assert_eq!(error.problem.code(), "reserved_key", "{path}");
            assert!(error.problem.detail().contains(&format!("`{works}`")), "{}", error.problem.detail());
        }
    }

    #[test]
    fn other_methods_are_not_allowed_and_unknown_routes_unknown() {
        let refusal = |path, method| refuse_method(&resolve(path).unwrap(), &method, path).problem.code();
        assert_eq!(refusal("/hello", Method::PATCH), "method_not_allowed");
        assert_eq!(refusal("/v1/kv/x", Method::POST), "method_not_allowed");
        assert_eq!(refusal("/health", Method::POST), "method_not_allowed");
        assert_eq!(refusal("/v2/x", Method::GET), "unknown_route");
        assert_eq!(refusal("/", Method::PUT), "invalid_key");
        assert_eq!(refusal("/", Method::POST), "method_not_allowed");
    }

    #[test]
    fn routes_stand_at_their_number_and_head_is_wherever_get_is() {
        for (at, route) in Route::ALL.into_iter().enumerate() {
            assert_eq!(route as usize, at);
            assert_eq!(route.allows(&Method::GET), route.allows(&Method::HEAD), "{route:?}");
            assert!(route.allows(&Method::OPTIONS), "{route:?}");
        }
    }
}
