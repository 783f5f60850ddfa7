// Link forwards TCP ports as a network link of one's choosing would: one bandwidth shared by all ports, a delay each way,
// byte counters, and faults that are switched on and off while it runs. It needs no privileges.
//
//	link -control ADDR [-mbit N] [-delay D] [-listen ADDR=TARGET]... [-registry ADDR=TARGET]...
//
// The link is full duplex: each direction has the whole bandwidth, and all connections of all ports share it. The delay
// is a delay line: it never limits the throughput. A new connection costs one round trip more, as TCP's handshake would.
// ADDR may end in port 0; "listening ADDR=TARGET" is printed for each port, then "control ADDR".
//
// A -registry port also understands HTTP. It counts what is asked for by path, and it can refuse (403) every blob that is
// no image configuration: what is one, it learns from the manifests that pass through it.
//
// Control, over HTTP (PORT is the port's number; without `port` a call is for all ports):
//
//	GET  /counters                                          JSON, see the type Counters
//	POST /reset                                             counters to zero
//	POST /link?mbit=N&delay=D                               another bandwidth (0: unlimited) or delay from now on
//	POST /fault?port=PORT&kind=KIND[&after=N][&wait=D][&status=S]
//	POST /blobs?port=PORT&layers=refuse|allow[&allow=sha256:...,...]
//
// Kinds of fault. What an answer is, is told from the direction in which bytes flow, so pipelined requests count as one.
// Setting a fault other than `none` and `slow` ends the connections that are open, so that every client meets it.
//
//	none        as if nothing had been
//	refuse      connections are refused
//	blackhole   connections are made, and nothing passes
//	stall       each answer stops after its first N bytes; the connection stays open
//	truncate    each answer ends after its first N bytes: the connection is closed
//	reset       each answer ends after its first N bytes: the connection is reset (after=0: before the first)
//	flip        the byte N of each answer has a bit flipped
//	slow        each request waits for D (default 5s) before it passes
//	status      each HTTP request is answered S (default 500) and does not pass
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

// Counters is what GET /counters answers, by port number.
type Counters struct {
	Ports map[string]PortCounters `json:"ports"`
	// Sums of all ports. Bytes count when they have left the link, headers included.
	Up   int64 `json:"up"`
	Down int64 `json:"down"`
}

// PortCounters are those of one port.
type PortCounters struct {
	Target      string `json:"target"`
	Up          int64  `json:"up"`
	Down        int64  `json:"down"`
	Connections int64  `json:"connections"`
	// Changes from up to down traffic: HTTP requests, for clients that do not pipeline.
	Requests int64  `json:"requests"`
	Fault    string `json:"fault"`
	// Of a -registry port only.
	Registry *RegistryCounters `json:"registry,omitempty"`
}

type pairs []string

func (p *pairs) String() string     { return strings.Join(*p, " ") }
func (p *pairs) Set(v string) error { *p = append(*p, v); return nil }

func main() {
	var plain, registries pairs
	control := flag.String("control", "127.0.0.1:0", "where the control port listens")
	mbit := flag.Float64("mbit", 0, "bandwidth of each direction in Mbit/s; 0 is unlimited")
	delay := flag.Duration("delay", 0, "delay each way")
	flag.Var(&plain, "listen", "ADDR=TARGET: forward this port")
	flag.Var(&registries, "registry", "ADDR=TARGET: forward this port to a registry")
	flag.Parse()
	log.SetFlags(log.Ltime | log.Lmicroseconds)
	link := NewLink(*mbit, *delay)
	for kind, list := range map[bool]pairs{false: plain, true: registries} {
		for _, pair := range list {
			address, target, ok := strings.Cut(pair, "=")
			if !ok {
				log.Fatalf("%q is not ADDR=TARGET", pair)
			}
			port, err := link.Forward(address, target, kind)
			if err != nil {
				log.Fatal(err)
			}
			fmt.Printf("listening %s=%s\n", port.Address, target)
		}
	}
	listener, err := net.Listen("tcp", *control)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("control %s\n", listener.Addr())
	_ = os.Stdout.Sync()
	log.Fatal(http.Serve(listener, link.Control()))
}

// Control is the handler of the control port.
func (l *Link) Control() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /counters", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		encoder := json.NewEncoder(w)
		encoder.SetIndent("", "  ")
		_ = encoder.Encode(l.Counters())
	})
	mux.HandleFunc("POST /reset", func(w http.ResponseWriter, _ *http.Request) {
		for _, p := range l.ports {
			p.resetCounters()
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("POST /link", answer(l.setLink))
	mux.HandleFunc("POST /fault", answer(func(r *http.Request) error {
		fault, err := parseFault(r)
		if err != nil {
			return err
		}
		return l.each(r, func(p *Port) error { return p.SetFault(fault) })
	}))
	mux.HandleFunc("POST /blobs", answer(func(r *http.Request) error {
		return l.each(r, func(p *Port) error {
			if p.guard == nil {
				if r.FormValue("port") == "" {
					return nil
				}
				return fmt.Errorf("port %d is not a -registry port", p.number())
			}
			return p.guard.configure(r)
		})
	}))
	return mux
}

func answer(do func(*http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := do(r); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		fmt.Fprintln(w, "ok")
	}
}

func (l *Link) setLink(r *http.Request) error {
	if v := r.FormValue("mbit"); v != "" {
		mbit, err := strconv.ParseFloat(v, 64)
		if err != nil || mbit < 0 {
			return fmt.Errorf("mbit: %q is not a bandwidth", v)
		}
		l.up.setRate(mbit)
		l.down.setRate(mbit)
	}
	if v := r.FormValue("delay"); v != "" {
		delay, err := time.ParseDuration(v)
		if err != nil || delay < 0 {
			return fmt.Errorf("delay: %q is not a duration", v)
		}
		l.delay.Store(int64(delay))
	}
	return nil
}

// each runs `do` on the port the request names, or on all.
func (l *Link) each(r *http.Request, do func(*Port) error) error {
	wanted, found := r.FormValue("port"), false
	for _, p := range l.ports {
		if wanted != "" && wanted != strconv.Itoa(p.number()) {
			continue
		}
		found = true
		if err := do(p); err != nil {
			return err
		}
	}
	if !found {
		return fmt.Errorf("there is no port %q", wanted)
	}
	return nil
}
