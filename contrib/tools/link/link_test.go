package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"
)

// server answers GET /N with N bytes, and counts what is put.
func server(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPut {
			n, _ := io.Copy(io.Discard, r.Body)
			fmt.Fprint(w, n)
			return
		}
		var n int
		if _, err := fmt.Sscanf(r.URL.Path, "/%d", &n); err != nil {
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(n))
		for zeros := make([]byte, 1<<20); n > 0; n -= len(zeros) {
			_, _ = w.Write(zeros[:min(n, len(zeros))])
		}
	}))
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func forward(t *testing.T, l *Link, target string) string {
	t.Helper()
	p, err := l.Forward("127.0.0.1:0", target, false)
	if err != nil {
		t.Fatal(err)
	}
	return p.Address
}

func client() *http.Client {
	return &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16}, Timeout: 20 * time.Second}
}

func get(c *http.Client, address string, n int) (body []byte, status int, err error) {
	r, err := c.Get(fmt.Sprintf("http://%s/%d", address, n))
	if err != nil {
		return nil, 0, err
	}
	defer r.Body.Close()
	body, err = io.ReadAll(r.Body)
	return body, r.StatusCode, err
}

func near(t *testing.T, what string, got, want, slack float64) {
	t.Helper()
	t.Logf("%s: %.3f, want %.3f", what, got, want)
	if got < want*(1-slack) || got > want*(1+slack) {
		t.Errorf("%s is %.3f, not within %.0f %% of %.3f", what, got, slack*100, want)
	}
}

// size reads an answer of n bytes and keeps nothing.
func size(c *http.Client, address string, n int) int64 {
	r, err := c.Get(fmt.Sprintf("http://%s/%d", address, n))
	if err != nil {
		return -1
	}
	defer r.Body.Close()
	got, _ := io.Copy(io.Discard, r.Body)
	return got
}

// timed runs `n` at once and says how long all took.
func timed(n int, do func()) float64 {
	start := time.Now()
	var all sync.WaitGroup
	for range n {
		all.Go(do)
	}
	all.Wait()
	return time.Since(start).Seconds()
}

func TestBandwidthIsSharedByPortsAndConnections(t *testing.T) {
	l := NewLink(200, 0)
	target := server(t)
	addresses := []string{forward(t, l, target), forward(t, l, target)}
	for _, connections := range []int{1, 4} {
		var mutex sync.Mutex
		turn := 0
		seconds := timed(connections, func() {
			mutex.Lock()
			address := addresses[turn%2]
			turn++
			mutex.Unlock()
			if got := size(client(), address, 10_000_000/connections); got != int64(10_000_000/connections) {
				t.Errorf("%d bytes", got)
			}
		})
		near(t, fmt.Sprintf("Mbit/s with %d connections", connections), 80/seconds, 200, 0.1)
	}
}

func TestDelayCostsARoundTripAndNoThroughput(t *testing.T) {
	l := NewLink(400, 50*time.Millisecond)
	address, c := forward(t, l, server(t)), client()
	near(t, "seconds of a first request", timed(1, func() { _, _, _ = get(c, address, 1) }), 0.2, 0.15)
	near(t, "seconds of a second request", timed(1, func() { _, _, _ = get(c, address, 1) }), 0.1, 0.15)
	// 20 MB at 400 Mbit/s are 0.4 s. Were the delay to limit it, a window of any usual size would show.
	near(t, "seconds of a long answer", timed(1, func() { size(c, address, 20_000_000) }), 0.5, 0.15)
	put, _ := http.NewRequest(http.MethodPut, "http://"+address+"/", bytes.NewReader(make([]byte, 20_000_000)))
	near(t, "seconds of a long request", timed(1, func() {
		r, err := c.Do(put)
		if err != nil {
			t.Error(err)
			return
		}
		_ = r.Body.Close()
	}), 0.5, 0.15)
}

func TestUnlimitedIsFast(t *testing.T) {
	l := NewLink(0, 0)
	address := forward(t, l, server(t))
	seconds := timed(1, func() { size(client(), address, 500_000_000) })
	t.Logf("%.0f MB/s", 500/seconds)
	if seconds > 3 {
		t.Errorf("500 MB took %.1f s", seconds)
	}
}

func control(t *testing.T, l *Link) func(path string) string {
	t.Helper()
	s := httptest.NewServer(l.Control())
	t.Cleanup(s.Close)
	return func(path string) string {
		t.Helper()
		method, wanted := http.MethodPost, strings.TrimPrefix(path, "GET ")
		if wanted != path {
			method = http.MethodGet
		}
		request, _ := http.NewRequest(method, s.URL+wanted, nil)
		r, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		body, _ := io.ReadAll(r.Body)
		if r.StatusCode != 200 {
			return "error: " + string(body)
		}
		return string(body)
	}
}

func TestCounters(t *testing.T) {
	l := NewLink(0, 0)
	address, ask := forward(t, l, server(t)), control(t, l)
	c := client()
	for range 3 {
		_, _, _ = get(c, address, 100_000)
	}
	var counters Counters
	if err := json.Unmarshal([]byte(ask("GET /counters")), &counters); err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(address)
	p := counters.Ports[port]
	if p.Connections != 1 || p.Requests != 3 || p.Down < 300_000 || p.Down > 302_000 || p.Up < 100 || p.Up > 2000 || counters.Down != p.Down {
		t.Errorf("%+v", counters)
	}
	ask("/reset")
	if got := l.Counters(); got.Down != 0 || got.Ports[port].Requests != 0 {
		t.Errorf("after a reset: %+v", got)
	}
}

func TestControlRefusesNonsense(t *testing.T) {
	l := NewLink(0, 0)
	forward(t, l, server(t))
	ask := control(t, l)
	for _, path := range []string{
		"/fault?kind=unheard-of", "/fault", "/fault?kind=stall&after=-1", "/fault?kind=slow&wait=never", "/fault?kind=none&port=1",
		"/fault?kind=status&status=20", "/link?mbit=fast", "/link?delay=-1s",
	} {
		if got := ask(path); !strings.HasPrefix(got, "error: ") {
			t.Errorf("%s: %s", path, got)
		}
	}
}

func TestFaults(t *testing.T) {
	l := NewLink(0, 0)
	address, ask := forward(t, l, server(t)), control(t, l)
	c := client()
	c.Timeout = time.Second
	good := func() {
		t.Helper()
		if got := ask("/fault?kind=none"); got != "ok\n" {
			t.Fatal(got)
		}
		// A connection that the fault ended may still be in the client's pool.
		c.CloseIdleConnections()
		if body, status, err := get(c, address, 100_000); len(body) != 100_000 || status != 200 || err != nil {
			t.Fatalf("after the fault: %d bytes, %d, %v", len(body), status, err)
		}
	}
	good()
	for _, test := range []struct {
		fault string
		bytes int // of the body that arrive: at most
		want  string
	}{
		{"refuse", 0, "connection refused"},
		{"blackhole", 0, "deadline exceeded"},
		{"stall&after=50000", 50_000, "deadline exceeded"},
		{"truncate&after=50000", 50_000, "unexpected EOF"},
		{"reset&after=50000", 50_000, "connection reset"},
		{"reset", 0, "connection reset|EOF"},
		{"slow&wait=3s", 0, "deadline exceeded"},
	} {
		ask("/fault?kind=" + test.fault)
		body, _, err := get(c, address, 100_000)
		matched := false
		for _, want := range strings.Split(test.want, "|") {
			matched = matched || (err != nil && strings.Contains(err.Error(), want))
		}
		if !matched {
			t.Errorf("%s: %v, want %s", test.fault, err, test.want)
		}
		if len(body) > test.bytes || len(body) < test.bytes-1000 {
			t.Errorf("%s: %d bytes passed, not about %d", test.fault, len(body), test.bytes)
		}
		good()
	}
	ask("/fault?kind=flip&after=60000")
	for range 2 {
		body, _, err := get(c, address, 100_000)
		if err != nil || len(body) != 100_000 || bytes.Count(body, []byte{0}) != 99_999 {
			t.Errorf("flip: %d bytes, %d of them zero, %v", len(body), bytes.Count(body, []byte{0}), err)
		}
	}
	good()
	ask("/fault?kind=status&status=503")
	for range 2 {
		if _, status, err := get(c, address, 1); status != 503 || err != nil {
			t.Errorf("status: %d, %v", status, err)
		}
	}
	good()
	c.Timeout = 0
	ask("/fault?kind=slow&wait=300ms")
	for range 2 {
		near(t, "seconds of a slow request", timed(1, func() { _, _, _ = get(c, address, 1) }), 0.3, 0.2)
	}
	good()
}

func TestARegistryThatLetsNoLayerPass(t *testing.T) {
	config, layer := "sha256:"+strings.Repeat("c", 64), "sha256:"+strings.Repeat("1", 64)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "/manifests/1"):
			fmt.Fprintf(w, `{"config":{"digest":%q},"layers":[{"digest":%q}]}`, config, layer)
		case strings.Contains(r.URL.Path, "/blobs/uploads/"):
			fmt.Fprint(w, r.Host)
		default:
			fmt.Fprint(w, "blob")
		}
	}))
	defer s.Close()
	l := NewLink(0, 0)
	p, err := l.Forward("127.0.0.1:0", s.Listener.Addr().String(), true)
	if err != nil {
		t.Fatal(err)
	}
	ask := control(t, l)
	fetch := func(path string, want int) string {
		t.Helper()
		r, err := http.Get("http://" + p.Address + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		body, _ := io.ReadAll(r.Body)
		if r.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, r.StatusCode, want)
		}
		return string(body)
	}
	fetch("/v2/a/b/blobs/"+layer, 200)
	ask("/reset")
	ask("/blobs?layers=refuse")
	fetch("/v2/a/b/manifests/1", 200)
	fetch("/v2/a/b/blobs/"+config, 200)
	fetch("/v2/a/b/blobs/"+layer, 403)
	fetch("/v2/other/blobs/"+layer, 403)
	if got := fetch("/v2/a/b/blobs/uploads/", 200); got != p.Address {
		t.Errorf("the registry was asked as %s, not as %s", got, p.Address)
	}
	c := l.Counters().Ports[p.Address[strings.LastIndex(p.Address, ":")+1:]].Registry
	blob := c.Blobs["/v2/a/b/blobs/"+config]
	if c.LayerGets != 2 || c.LayerRefused != 2 || c.LayerBytes != 0 || c.Manifests["/v2/a/b/manifests/1"].Gets != 1 || !blob.Config || blob.Bytes != 4 {
		t.Errorf("%+v, config %+v", c, blob)
	}
	other := "sha256:" + strings.Repeat("2", 64)
	ask("/blobs?layers=refuse&allow=" + url.QueryEscape(other))
	fetch("/v2/a/b/blobs/"+other, 200)
	ask("/blobs?layers=allow")
	fetch("/v2/a/b/blobs/"+layer, 200)
}
