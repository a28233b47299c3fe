//! Proxies between peers: every member advertises its proxy, and a connection belongs to the sender that its first request names, so
//! each direction of each link can be cut by itself.

use std::collections::{HashMap, HashSet};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// (from, to)
pub type Link = (u64, u64);

/// Which links are cut, and which are slow.
pub struct Links {
    cut: watch::Sender<HashSet<Link>>,
    /// By the member at either end: whatever it sends or is sent waits so long, piece by piece.
    slow: Mutex<HashMap<u64, Duration>>,
    ports: Mutex<HashMap<u64, u16>>,
}

impl Links {
    pub fn new() -> Arc<Links> {
        Arc::new(Links {
            cut: watch::Sender::new(HashSet::new()),
            slow: Mutex::default(),
            ports: Mutex::default(),
        })
    }

    /// Listens for the peers of `id` and gives the URL to advertise.
    pub fn listen(self: &Arc<Links>, id: u64, target: u16) -> String {
        let listener = std::net::TcpListener::bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, crate::harness::free_port())).unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        self.ports.lock().insert(id, port);
        let listener = TcpListener::from_std(listener).unwrap();
        let links = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(links.clone().carry(stream, id, target));
            }
        });
        format!("http://127.0.0.1:{port}")
    }

    /// Cuts every link that `id` has, both ways.
    pub fn isolate(&self, id: u64, others: &[u64]) {
        self.cut.send_modify(|cut| {
            for &other in others.iter().filter(|&&other| other != id) {
                cut.insert((id, other));
                cut.insert((other, id));
            }
        });
    }

    /// Cuts one direction.
    pub fn cut_one_way(&self, from: u64, to: u64) {
        self.cut.send_modify(|cut| {
            cut.insert((from, to));
        });
    }

    /// Cuts these directions of links, and heals all others.
    pub fn cut_exactly(&self, links: HashSet<Link>) {
        self.cut.send_replace(links);
    }

    pub fn heal(&self) {
        self.cut.send_modify(HashSet::clear);
    }

    /// Makes all links of a member slow; [`Duration::ZERO`] ends it.
    pub fn slow_down(&self, id: u64, delay: Duration) {
        self.slow.lock().insert(id, delay);
    }

    fn delay(&self, (from, to): Link) -> Duration {
        let slow = self.slow.lock();
        let of = |id| slow.get(&id).copied().unwrap_or_default();
        of(from).max(of(to))
    }

    /// Carries one direction until either end is gone.
    async fn pump(&self, link: Link, mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
        let mut piece = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = from.read(&mut piece).await {
            let delay = self.delay(link);
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            if to.write_all(&piece[..count]).await.is_err() {
                return;
            }
        }
        // The other side may be gone already.
        let _ = to.shutdown().await;
    }

    async fn carry(self: Arc<Links>, mut inbound: TcpStream, to: u64, target: u16) {
        let mut head = Vec::new();
        let from = loop {
            if let Some(from) = sender(&head) {
                break from;
            }
            if head.len() > 16 * 1024 || !matches!(inbound.read_buf(&mut head).await, Ok(1..)) {
                return;
            }
        };
        let mut cut = self.cut.subscribe();
        if cut.borrow().contains(&(from, to)) {
            return black_hole(inbound).await;
        }
        let Ok(mut outbound) = TcpStream::connect(SocketAddrV4::new(Ipv4Addr::LOCALHOST, target)).await else {
            return;
        };
        if outbound.write_all(&head).await.is_err() {
            return;
        }
        let (inbound_read, inbound_write) = inbound.split();
        let (outbound_read, outbound_write) = outbound.split();
        let there = self.pump((from, to), inbound_read, outbound_write);
        let back = self.pump((to, from), outbound_read, inbound_write);
        tokio::select! {
            _ = async { tokio::join!(there, back) } => {}
            _ = cut.wait_for(|cut| cut.contains(&(from, to))) => {}
        }
    }
}

/// Like a link without an end: takes everything, answers nothing.
async fn black_hole(mut stream: TcpStream) {
    let mut sink = [0; 4096];
    while matches!(stream.read(&mut sink).await, Ok(1..)) {}
}

fn sender(head: &[u8]) -> Option<u64> {
    let text = String::from_utf8_lossy(head);
    let (_, rest) = text.split_once(";from=")?;
    let (from, _) = rest.split_once(';')?;
    from.parse().ok()
}
