package main

import (
	"errors"
	"io"
	"log"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// piece is how many bytes are taken from a connection at most before the others have their turn.
const piece = 64 << 10

var pieces = sync.Pool{New: func() any { return new([piece]byte) }}

// Link is what the ports share.
type Link struct {
	up, down bucket
	delay    atomic.Int64 // nanoseconds each way
	ports    []*Port
}

// NewLink makes a link of `mbit` Mbit/s (0: unlimited) each way.
func NewLink(mbit float64, delay time.Duration) *Link {
	l := &Link{}
	l.up.setRate(mbit)
	l.down.setRate(mbit)
	l.delay.Store(int64(delay))
	return l
}

// bucket is a token bucket as a clock: `next` is when the wire is free again.
type bucket struct {
	mutex sync.Mutex
	rate  float64 // bytes a second; 0 is unlimited
	next  time.Time
}

// A sender that wakes up late loses no bandwidth as long as it had something to send all the time: on a busy machine that
// is tens of milliseconds. One that had nothing begins anew.
const (
	lateBusy = 50 * time.Millisecond
	lateIdle = time.Millisecond
)

func (b *bucket) setRate(mbit float64) {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	b.rate, b.next = mbit*1e6/8, time.Time{}
}

// share is how much a connection may take at once: half a millisecond of the wire.
func (b *bucket) share() int {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	if b.rate == 0 {
		return piece
	}
	return min(piece, max(4096, int(b.rate/2000)))
}

// reserve takes n bytes' time on the wire and says when they have left.
func (b *bucket) reserve(n int, busy bool) time.Time {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	now, late := time.Now(), lateIdle
	if b.rate == 0 {
		return now
	}
	if busy {
		late = lateBusy
	}
	if earliest := now.Add(-late); b.next.Before(earliest) {
		b.next = earliest
	}
	b.next = b.next.Add(time.Duration(float64(n) / b.rate * 1e9))
	return b.next
}

// Port is one forwarded port.
type Port struct {
	Address string
	target  string
	link    *Link
	guard   *guard

	mutex    sync.Mutex
	listener net.Listener // nil while connections are refused
	fault    Fault
	open     map[*connection]struct{}

	up, down, connections, requests atomic.Int64
}

// Forward opens a port. With `registry` its HTTP is understood.
func (l *Link) Forward(address, target string, registry bool) (*Port, error) {
	p := &Port{target: target, link: l, open: map[*connection]struct{}{}}
	if registry {
		var err error
		if p.guard, err = newGuard(target); err != nil {
			return nil, err
		}
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	p.Address = listener.Addr().String()
	p.serve(listener)
	l.ports = append(l.ports, p)
	return p, nil
}

func (p *Port) number() int {
	_, port, _ := net.SplitHostPort(p.Address)
	n, _ := strconv.Atoi(port)
	return n
}

func (p *Port) serve(listener net.Listener) {
	p.listener = listener
	go func() {
		for {
			client, err := listener.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				// Out of descriptors, most likely: later.
				log.Printf("%s: %v", p.Address, err)
				time.Sleep(100 * time.Millisecond)
				continue
			}
			p.connections.Add(1)
			go p.connect(client.(*net.TCPConn))
		}
	}()
}

// upstream is where the bytes go: the target itself, or our own HTTP server in front of it.
func (p *Port) upstream() string {
	if p.guard != nil {
		return p.guard.address
	}
	return p.target
}

// connection is one client's, with what is known of the exchange on it.
type connection struct {
	port           *Port
	client, server *net.TCPConn

	mutex     sync.Mutex
	answering bool  // the last byte went down
	answered  int64 // bytes of the current answer
	requested bool  // a request has been seen

	once  sync.Once
	ended chan struct{}
	gone  chan struct{} // the client sends nothing more
}

func (p *Port) connect(client *net.TCPConn) {
	c := &connection{port: p, client: client, ended: make(chan struct{}), gone: make(chan struct{})}
	p.mutex.Lock()
	fault := p.fault
	p.open[c] = struct{}{}
	p.mutex.Unlock()
	defer c.end(false)
	// The handshake's round trip.
	time.Sleep(2 * time.Duration(p.link.delay.Load()))
	switch {
	case fault.Kind == "blackhole":
		_, _ = io.Copy(io.Discard, c.client)
		return
	case fault.Kind == "status":
		answerStatus(client, fault.Status)
		return
	case fault.Kind == "reset" && fault.After == 0:
		c.end(true)
		return
	}
	server, err := net.DialTimeout("tcp", p.upstream(), 10*time.Second)
	if err != nil {
		// What the client would see of a port where nobody listens; it has connected already.
		c.end(true)
		return
	}
	p.mutex.Lock()
	c.server = server.(*net.TCPConn)
	_, still := p.open[c]
	p.mutex.Unlock()
	if !still {
		_ = server.Close()
		return
	}
	var both sync.WaitGroup
	both.Add(2)
	go func() {
		defer both.Done()
		defer close(c.gone)
		c.pump(c.client, c.server, &p.link.up, c.goesUp, &p.up)
	}()
	go func() { defer both.Done(); c.pump(c.server, c.client, &p.link.down, c.comesDown, &p.down) }()
	both.Wait()
}

// end closes both sides, once.
func (c *connection) end(reset bool) {
	c.once.Do(func() {
		close(c.ended)
		c.port.mutex.Lock()
		delete(c.port.open, c)
		server := c.server
		c.port.mutex.Unlock()
		for _, side := range []*net.TCPConn{c.client, server} {
			if side == nil {
				continue
			}
			if reset {
				_ = side.SetLinger(0)
			}
			_ = side.Close()
		}
	})
}

type packet struct {
	at     time.Time
	data   []byte
	buffer *[piece]byte
}

// pump moves bytes from one side to the other: each piece takes its time on the wire, then the delay. What is under way
// is bounded, by more than the link can hold.
func (c *connection) pump(from, to *net.TCPConn, wire *bucket, pass func([]byte) ([]byte, verdict), count *atomic.Int64) {
	line := make(chan packet, 1024)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for p := range line {
			if early := time.Until(p.at); early > 0 {
				time.Sleep(early)
			}
			if _, err := to.Write(p.data); err != nil {
				c.end(false)
				break
			}
			count.Add(int64(len(p.data)))
			pieces.Put(p.buffer)
		}
		for range line {
		}
	}()
	delay := func() time.Duration { return time.Duration(c.port.link.delay.Load()) }
	result, busy := verdictPass, false
	for result == verdictPass {
		buffer, share := pieces.Get().(*[piece]byte), wire.share()
		n, err := from.Read(buffer[:share])
		if n > 0 {
			var data []byte
			data, result = pass(buffer[:n])
			leaves := wire.reserve(len(data), busy)
			// Sleeping costs more than a piece takes: a little ahead is let through.
			if ahead := time.Until(leaves); ahead > time.Millisecond {
				time.Sleep(ahead)
			}
			line <- packet{leaves.Add(delay()), data, buffer}
			busy = n == share
		}
		if err != nil {
			break
		}
	}
	close(line)
	<-done
	switch result {
	case verdictPass:
		// The other direction may go on: HTTP clients do not, but TCP allows it.
		_ = to.CloseWrite()
	case verdictStall:
		select {
		case <-c.ended:
		case <-c.gone:
			c.end(false)
		}
	case verdictClose:
		c.end(false)
	case verdictReset:
		c.end(true)
	}
}

func (p *Port) resetCounters() {
	for _, n := range []*atomic.Int64{&p.up, &p.down, &p.connections, &p.requests} {
		n.Store(0)
	}
	if p.guard != nil {
		p.guard.reset()
	}
}

// Counters of all ports.
func (l *Link) Counters() Counters {
	all := Counters{Ports: map[string]PortCounters{}}
	for _, p := range l.ports {
		p.mutex.Lock()
		fault := p.fault.String()
		p.mutex.Unlock()
		c := PortCounters{
			Target: p.target, Up: p.up.Load(), Down: p.down.Load(),
			Connections: p.connections.Load(), Requests: p.requests.Load(), Fault: fault,
		}
		if p.guard != nil {
			c.Registry = p.guard.counters()
		}
		all.Ports[strconv.Itoa(p.number())] = c
		all.Up += c.Up
		all.Down += c.Down
	}
	return all
}
