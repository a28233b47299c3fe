//! The members' client URLs, and which of them is asked first.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use http::Uri;

use super::ClientError;

/// The endpoints; the one that answered last is preferred.
#[derive(Debug)]
pub(super) struct Endpoints {
    /// Without a slash at the end. Never empty.
    urls: Vec<String>,
    preferred: AtomicUsize,
    /// Whether each refused the timeout that it was asked with, as longer than it allows.
    refuses_timeout: Vec<AtomicBool>,
}

impl Endpoints {
    pub(super) fn parse<E: AsRef<str>>(endpoints: impl IntoIterator<Item = E>) -> Result<Endpoints, ClientError> {
        let urls: Vec<String> = endpoints.into_iter().map(|url| parse_url(url.as_ref())).collect::<Result<_, _>>()?;
        if urls.is_empty() {
            return Err(ClientError::Invalid("no endpoint given".to_owned()));
        }
        Ok(Endpoints {
            refuses_timeout: urls.iter().map(|_| AtomicBool::new(false)).collect(),
            urls,
            preferred: AtomicUsize::new(0),
        })
    }

    pub(super) fn urls(&self) -> impl Iterator<Item = &str> {
        self.urls.iter().map(String::as_str)
    }

    pub(super) fn len(&self) -> usize {
        self.urls.len()
    }

    fn refuses_timeout(&self, index: usize) -> Option<&AtomicBool> {
        self.refuses_timeout.get(index % self.urls.len())
    }

    /// Whether it is told how long to take.
    pub(super) fn takes_timeout(&self, index: usize) -> bool {
        !self.refuses_timeout(index).is_some_and(|refuses| refuses.load(Ordering::Relaxed))
    }

    /// From now on it takes as long as it does without being told.
    pub(super) fn leave_timeout_to_server(&self, index: usize) {
        if let Some(refuses) = self.refuses_timeout(index) {
            refuses.store(true, Ordering::Relaxed);
        }
    }

    /// The index of the endpoint to ask first.
    pub(super) fn preferred(&self) -> usize {
        self.preferred.load(Ordering::Relaxed) % self.urls.len()
    }

    pub(super) fn url(&self, index: usize) -> &str {
        self.urls.get(index % self.urls.len()).map_or("", String::as_str)
    }

    /// The endpoint after `failed`; others will ask it first too, unless somebody moved on before.
    pub(super) fn after(&self, failed: usize) -> usize {
        let next = (failed + 1) % self.urls.len();
        // Lost races are fine: whoever wins names an endpoint that is not the failed one.
        let _ = self.preferred.compare_exchange(failed, next, Ordering::Relaxed, Ordering::Relaxed);
        next
    }
}

fn parse_url(text: &str) -> Result<String, ClientError> {
    let wrong = |why: &str| ClientError::Invalid(format!("endpoint {text:?} {why}: write it as http://host:port"));
    let uri: Uri = text.trim().parse().map_err(|_| wrong("is not a URL"))?;
    match uri.scheme_str() {
        Some("http") => {}
        Some("https") => return Err(wrong("is https, which this build does not speak yet")),
        _ => return Err(wrong("is not an http URL")),
    }
    let authority = uri.authority().ok_or_else(|| wrong("has no host"))?;
    if authority.as_str().contains('@') {
        return Err(wrong("has user information"));
    }
    if authority.host().is_empty() {
        return Err(wrong("has no host"));
    }
    if authority.port_u16().is_none_or(|port| port == 0) && authority.as_str() != authority.host() {
        return Err(wrong("has a port that is not a number from 1 to 65535"));
    }
    if uri.path() != "/" || uri.query().is_some() {
        return Err(wrong("has more than host and port"));
    }
    Ok(format!("http://{authority}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_host_and_a_port() {
        let endpoints = Endpoints::parse(["http://a:1/", " http://[::1]:3379", "http://plain"]).unwrap();
        assert_eq!(
            endpoints.urls().collect::<Vec<_>>(),
            ["http://a:1", "http://[::1]:3379", "http://plain"]
        );
        for bad in [
            "",
            "a:1",
            "https://a:1",
            "http://a:1/x",
            "http://a:1?x",
            "http://u@a:1",
            "http://a:0",
            "http://a:99999",
            "http://a:",
            "ftp://a",
        ] {
            assert!(Endpoints::parse([bad]).is_err(), "{bad}");
        }
        assert!(Endpoints::parse(Vec::<String>::new()).is_err());
    }

    #[test]
    fn a_failed_endpoint_is_left_by_all_and_a_working_one_is_kept() {
        let endpoints = Endpoints::parse(["http://a:1", "http://b:1"]).unwrap();
        assert_eq!(endpoints.after(0), 1);
        assert_eq!(endpoints.preferred(), 1);
        assert_eq!(endpoints.after(0), 1, "somebody else fails at the first one too");
        assert_eq!(endpoints.preferred(), 1);
        assert_eq!(endpoints.after(1), 0);
    }
}
